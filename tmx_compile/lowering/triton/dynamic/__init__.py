"""Block-sparse attention on a GPU: kernels that choose blocks, and kernels that attend to them."""
