"""FlexAttention block masks through Inductor: one contract, a CPU form and a CUDA form."""

from tmx_compile.lowering.flex.lowering import Flex

__all__ = ["Flex"]
