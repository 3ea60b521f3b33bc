"""Find attention in an FX graph, prove its mask, substitute the operator. Nothing here knows a lowering."""
