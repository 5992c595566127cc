"""The backend "comm" of torch.distributed: its process groups, and their creation."""
