"""Who is fastest where: choices among the ways to do an op, by processor and by GPU, as data."""
