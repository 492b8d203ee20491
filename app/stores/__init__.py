"""Things on disk. Each store is a class whose methods hide where the bytes live."""
