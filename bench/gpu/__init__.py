"""The kernels of a CUDA device beside their rivals there; `make gpu` runs them."""
