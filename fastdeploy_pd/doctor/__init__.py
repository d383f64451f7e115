"""`fastdeploy-pd doctor`: what this machine, and a pair of machines, can do, said before a request is risked on it. See docs/doctor.md."""
