"""How a test process names its own directories of shared memory, so that nobody takes them for left behind."""


def own_directory_prefix(pid: int) -> str:
    return f"regrow-test-{pid}-"
