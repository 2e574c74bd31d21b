"""Attacks on runs: scripts that kill, stop, fill and damage, and compare what the same command makes of it.

Each is run by hand, prints a table, and writes a line of JSON for each attack; docs/surviving.md shows what they found:

    python -m tests.train.attacks.kills --count 120      SIGKILL at random moments, inside saves and prunes, at the end
    python -m tests.train.attacks.ranks --count 30       ranks and launchers of two processes, DDP and FSDP2
    python -m tests.train.attacks.prunes --count 40      SIGKILL before and after each file of an old checkpoint goes
    python -m tests.train.attacks.behind --count 10      shards that are written while steps go on: kills, full disks
    python -m tests.train.attacks.groups                 groups stopped, signalled, and resumed in other numbers
    python -m tests.train.attacks.flips --count 4000     flipped bits, cut files, pickles and false shards
    python -m tests.train.attacks.forged --count 150     run folders that somebody else has made up
    python -m tests.train.attacks.disk                   disks that are full or fail, permissions, clocks, limits, names
    python -m tests.train.attacks.outputs                closed terminals, readers that end, full disks
"""
