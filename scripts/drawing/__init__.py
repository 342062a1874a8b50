"""The pictures in docs/, each made from a run of the program: see scripts/pictures."""
