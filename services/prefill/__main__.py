"""``python -m services.prefill``: one prefill worker."""

import logging
import os
import sys

from common.process_args import parse_process_args
from common.service_runner import run_service
from services.prefill.service import PrefillService


def main() -> int:
    args = parse_process_args("prefill")
    return run_service(args.name, PrefillService(args).serve)


if __name__ == "__main__":
    code = main()
    # Everything is closed; the interpreter would spend a second on taking torch apart.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
