"""``python -m services.decode``: one decode rank."""

import logging
import os
import sys

from common.process_args import parse_process_args
from common.service_runner import run_service
from services.decode.service import DecodeService


def main() -> int:
    args = parse_process_args("decode")
    return run_service(args.name, DecodeService(args).serve)


if __name__ == "__main__":
    code = main()
    # Everything is closed; the interpreter would spend a second on taking torch apart.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
