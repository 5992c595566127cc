"""From a process group to its handle: negotiate, connect, admit, prepare, capture, close."""
