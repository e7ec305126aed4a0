"""`python -m tests.local_head`: a Ray of its own with a job server, whose address it prints. Ends with its input."""

import logging
import sys

import ray

if __name__ == "__main__":
    context = ray.init(
        address="local", num_cpus=2, include_dashboard=True, log_to_driver=False, logging_level=logging.WARNING
    )
    sys.stdout.write(f"http://{context.dashboard_url}\n")
    sys.stdout.flush()
    sys.stdin.read()
    ray.shutdown()
