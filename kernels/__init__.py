"""The Triton kernels. Importing this package needs triton (the extra `gpu`); importing pocl_fast does not."""
