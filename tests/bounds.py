"""How long a test waits for what must come.

Other work on a machine can take any time away, so no test fails by the clock on the wall: it waits until what it waits
for is there, or until nothing can come any more. What only a hang would reach is an hour.
"""

HOUR = 3600.0
