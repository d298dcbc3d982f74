"""Reading an image, from a file or from memory."""
