"""The real torch_npu and torchair on a machine without CANN and without an NPU.

How to get the protobuf of a GE graph::

    # a test, in the main process; `npu` is a fixture of tests/compilers/ascend/conftest.py
    def test_something(npu, tmp_path):
        model = npu.call(programs.export_it, tmp_path, geometry=(4, 8, 16))      # -> bytes of a ge.proto.ModelDef

    # tests/support/ascend/programs.py or any importable module: runs in the other process, where torch_npu is loaded
    def export_it(folder, geometry):
        from tests.support.ascend.standin import capture
        return capture.exported(model, ids, folder=folder, dynamic=True)         # torchair.dynamo_export itself

    # or what the GE mode of torch.compile hands to the engine, and what comes back from your own executor
        with capture.engine(run) as models:
            out = torch.compile(model, backend=tmx_backend(cfg, target="ascend"))(ids)
        models[0]                                                                # bytes of a ModelDef

``npu.call(function, *args, **kwargs)`` runs a module-level function in one long-lived subprocess (torch_npu takes
seconds to import, so tests share it) and returns its pickled result; an exception comes back as ``RemoteError`` with
the traceback of the other side. What the function prints is in ``npu.output()``. To read a model there::

    from torchair._ge_concrete_graph.ge_ir_pb2 import ModelDef
    ops = ModelDef.FromString(data).graph[0].op

What is real: torch_npu's schemas and meta kernels, torchair's whole conversion from FX to GE, the writing of
``dynamo.pbtxt`` and the ``.air``, which holds exactly the serialised ModelDef (weights included, as torchair embeds
them, or as files beside it). What is not: everything behind CANN's C interface (``cann.cpp``). ``build.py`` makes a
function that ends the process, with its name, for each of its symbols that nothing here needs.

Setting up: ``tools/setup_env.py`` (``make test``) puts torch_npu and protobuf into ``.npu``, apart from the
environment: where torch_npu is installed but cannot load CANN, ``import torch`` fails. By hand::

    pip install --no-deps --upgrade --target .npu torch_npu==2.13.0 protobuf==7.36.2
"""
