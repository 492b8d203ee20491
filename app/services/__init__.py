"""What the server does, as functions and objects without HTTP in them."""
