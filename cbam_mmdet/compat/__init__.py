"""What other packages lack, and every patch of them, each with its undo."""
