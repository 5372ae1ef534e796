"""Tools around the four files: own data into shards, tests of pairs, search, timing, the report of a run. Each module
is a command; docs/ shows how they are used."""
