"""Wire shapes: what requests and answers look like in JSON and forms."""
