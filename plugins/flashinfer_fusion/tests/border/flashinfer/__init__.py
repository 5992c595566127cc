"""Stands at the border of the library: the functions that the plugin calls, for CPU tensors over Gloo."""
