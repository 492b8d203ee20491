"""HTTP resources, one file each: parse, one service call, answer."""
