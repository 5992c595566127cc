"""A fake FlashInfer: the functions that the plugin calls, for CPU tensors over Gloo."""
