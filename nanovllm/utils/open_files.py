"""The limit of open files of this process."""

import resource


def allow_open_files(count: int) -> None:
    """Raise this process's limit to `count` open files, connections included, or as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        new = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (new, hard))
