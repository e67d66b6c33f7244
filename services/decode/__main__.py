"""``python -m services.decode``: one decode rank."""

import sys

from common.process_args import parse_process_args
from common.service_runner import run_service
from services.decode.service import DecodeService


def main() -> int:
    args = parse_process_args("decode")
    return run_service(args.name, DecodeService(args).serve)


if __name__ == "__main__":
    sys.exit(main())
