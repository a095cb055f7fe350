"""Relay Diffusion (RDM, arXiv 2309.03350) in JAX and Flax."""
