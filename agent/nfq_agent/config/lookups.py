"""What names in a configuration refer to on this host: the ids of users and groups."""

from __future__ import annotations

import grp
import pwd


class HostLookups:
    """The `Lookups` of this host."""

    def uid(self, name: str) -> int:
        """The id of a user. Raises KeyError."""
        return pwd.getpwnam(name).pw_uid

    def gid(self, name: str) -> int:
        """The id of a group. Raises KeyError."""
        return grp.getgrnam(name).gr_gid
