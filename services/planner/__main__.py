"""``python -m services.planner``: see `common.process_args` for its options."""

import sys
from functools import partial

from common.process_args import parse_process_args
from common.service_runner import run_service
from services.planner.service import serve


def main() -> int:
    args = parse_process_args("planner")
    return run_service(args.name, partial(serve, args))


if __name__ == "__main__":
    sys.exit(main())
