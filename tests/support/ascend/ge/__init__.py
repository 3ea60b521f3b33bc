"""An interpreter for the GE graphs that torchair makes, on CPU tensors.

``run.execute(model, inputs)`` runs a serialised ``ge.proto.ModelDef`` with the semantics that the operator manual gives
to each operator. What the manual does not say, and what is outside its limits, raises ``node.GraphError`` with the
operator's type and the node's name: an attribute, an input, a dtype, a shape, a length. Nothing here knows of
``tmx_compile``.

Sources:
    GE prototypes (inputs, attributes, defaults, dtypes): ``REG_OP`` in CANN's ``op_proto`` headers; a copy of each
    is in ``torchair/_ge_concrete_graph/auto_generated_ge_raw_ops.py`` and ``dynamic_output_ops.py``.
    FusedInferAttentionScore: the manual of ``torch_npu.npu_fused_infer_attention_score``
    (``torch_npu/_op_plugin_docs.py``; op-plugin, ``docs/context``), and CANN's host code in ops-transformer where the
    manual is silent.
    AttentionUpdate: the manual of ``aclnnAttentionUpdate`` (ops-transformer, ``attention/attention_update/docs``).
"""
