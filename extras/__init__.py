"""Around the four files: own data into shards, tests of pairs, search, timing. Each module is a command; see docs."""
