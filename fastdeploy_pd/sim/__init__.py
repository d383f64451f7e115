"""The simulator: the scheduler, block pool and placement of `core/` under a virtual clock, with a latency model in the device's place."""
