"""The real torch_npu on stand-ins for CANN, and an interpreter of the GE graphs that it makes."""
