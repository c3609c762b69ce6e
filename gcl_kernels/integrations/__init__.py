"""Adapters from trainers' conventions to `gcl_kernels`; import the one you need by name."""
