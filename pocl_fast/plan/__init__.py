"""What a run would take, said before it is begun: samples, steps, parameters, disk, memory and time.

Knows runs and every room below. Loads no weights, but to time steps, and writes nothing in a run directory."""
