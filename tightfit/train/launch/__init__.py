"""How the processes of a run are started and find each other: roles, rendezvous, devices."""
