// The part of CANN that answers on a machine without an NPU; build.py adds a refusal for every other symbol.
//
// Layouts and names are those that torch_npu and torchair link against: classes of GE hold one shared pointer to their
// contents. A graph keeps the serialised ModelDef that torchair gives it, and saves exactly these bytes.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>

namespace ge {

class AscendString {
 public:
  AscendString(const char* text);
  const char* GetString() const;
  bool operator<(const AscendString& other) const;
  bool operator==(const AscendString& other) const;

 private:
  std::shared_ptr<std::string> text_;
};

AscendString::AscendString(const char* text) : text_(text ? std::make_shared<std::string>(text) : nullptr) {}
const char* AscendString::GetString() const { return text_ ? text_->c_str() : ""; }
bool AscendString::operator<(const AscendString& other) const {
  return std::strcmp(GetString(), other.GetString()) < 0;
}
bool AscendString::operator==(const AscendString& other) const {
  return std::strcmp(GetString(), other.GetString()) == 0;
}

class Graph {
 public:
  explicit Graph(const char* name);
  uint32_t LoadFromSerializedModelArray(const void* model, size_t size);
  uint32_t SaveToFile(const char* path) const;

 private:
  std::shared_ptr<std::string> model_;
};

Graph::Graph(const char*) {}

uint32_t Graph::LoadFromSerializedModelArray(const void* model, size_t size) {
  if (model == nullptr || size == 0) return 1;
  // torchair's own default constructor leaves the pointer empty.
  model_ = std::make_shared<std::string>(static_cast<const char*>(model), size);
  return 0;
}

uint32_t Graph::SaveToFile(const char* path) const {
  if (model_ == nullptr) return 1;
  std::FILE* file = std::fopen(path, "wb");
  if (file == nullptr) return 1;
  const bool whole = std::fwrite(model_->data(), 1, model_->size(), file) == model_->size();
  return std::fclose(file) == 0 && whole ? 0 : 1;
}

// torchair asks for operators that not every CANN has. The variable names one to lack, for tests of what is said then.
class TensorDesc {
 public:
  TensorDesc();

 private:
  std::shared_ptr<void> contents_;
};

TensorDesc::TensorDesc() {}

// An operator that it has, it has with every input; its attributes it does not tell.
class Operator {
 public:
  virtual ~Operator() = default;
  uint32_t UpdateInputDesc(const char* name, const TensorDesc& description);
  uint32_t GetAllIrAttrNamesAndTypes(std::map<AscendString, AscendString>& attributes) const;

 private:
  std::shared_ptr<void> contents_;
};

uint32_t Operator::UpdateInputDesc(const char*, const TensorDesc&) { return 0; }
uint32_t Operator::GetAllIrAttrNamesAndTypes(std::map<AscendString, AscendString>& attributes) const {
  attributes.clear();
  return 0;
}

class OperatorFactory {
 public:
  static bool IsExistOp(const char* type);
  static Operator CreateOperator(const char* name, const char* type);
};

Operator OperatorFactory::CreateOperator(const char*, const char*) { return Operator(); }

bool OperatorFactory::IsExistOp(const char* type) {
  const char* lacking = std::getenv("STANDIN_CANN_LACKS");
  return lacking == nullptr || std::strcmp(lacking, type) != 0;
}

// A session can be opened and closed; adding, compiling or running a graph in it is refused.
class Session {
 public:
  explicit Session(const std::map<AscendString, AscendString>& options);
  ~Session();
};

Session::Session(const std::map<AscendString, AscendString>&) {}
Session::~Session() {}

uint32_t GEInitialize(const std::map<AscendString, AscendString>&) { return 0; }
uint32_t GEFinalize() { return 0; }

}  // namespace ge

extern "C" {

// No device: torch.npu.is_available() is False, and nothing can be put on one.
int aclrtGetDeviceCount(uint32_t* count) {
  *count = 0;
  return 0;
}

// torchair opens its engine on a device before it converts a graph.
int aclrtSetDevice(int32_t) { return 0; }

}  // extern "C"
