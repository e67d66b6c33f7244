"""``python -m services.prefill``: one prefill worker."""

import sys

from common.process_args import parse_process_args
from common.service_runner import run_service
from services.prefill.service import PrefillService


def main() -> int:
    args = parse_process_args("prefill")
    return run_service(args.name, PrefillService(args).serve)


if __name__ == "__main__":
    sys.exit(main())
