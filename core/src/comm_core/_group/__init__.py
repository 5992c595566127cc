"""A process group's life: negotiate, connect, admit, prepare, capture, close."""
