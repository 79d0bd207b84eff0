"""A stand-in SFU and a stand-in homeserver, for the simulation, the tests, the demonstration and the benchmarks.

`sfu` and `homeserver` are models: no I/O, no clock, seeded randomness. `server` gives them HTTP on loopback. None of this is for
production: the models hand out tokens, obey anybody who reaches their control listener, and keep everything in memory. Nothing here
imports the rest of the package.
"""
