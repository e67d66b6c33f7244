"""``python -m services.monitor``"""

import sys

from common.process_args import parse_process_args
from common.service_runner import run_service
from services.monitor.service import serve


def main() -> int:
    args = parse_process_args("monitor")
    return run_service(args.name, lambda stop: serve(args, stop))


if __name__ == "__main__":
    sys.exit(main())
