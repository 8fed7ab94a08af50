# Shared by packaging/setup, packaging/quickstart and tests/run; sourced from the top of the checkout.

# Packages to build and to run the agent; the tests' own tools are in TEST_PACKAGES.
RUN_PACKAGES="ca-certificates clang gcc iproute2 iptables kmod libc6-dev libnetfilter-queue-dev pkg-config procps python3-dev
python3-venv util-linux"
TEST_PACKAGES="bind9-dnsutils chrony coturn conntrack curl dnsmasq-base ethtool fish ipset kcat libcap2-bin netcat-openbsd nghttp2-server openssh-client openssh-server
nftables knot-dnsutils libsystemd-shared nfdump nginx-light openssl openvpn postgresql prometheus rdesktop redis-tools tmux tshark
unbound vsftpd wireguard-go wireguard-tools xrdp xvfb zsh"
# Unpacked into build/ and not installed: they would take over the resolver and the firewall of this host; of the last one only one program is needed.
UNPACKED_PACKAGES="opensnitch systemd-resolved kubernetes-client"
# Tools that boot the test hosts; the tools that build and check packages are installed inside them.
BOOTED_PACKAGES="createrepo-c debian-archive-keyring debootstrap faketime git gpg mount netcat-openbsd openssh-client reprepro rpm systemd-container"
# The programs that the benchmarks compare with, and the one that draws.
BENCH_PACKAGES="gnuplot-nox golang-github-chifflier-nfqueue-go-dev golang-go haproxy iperf3 libndpi-dev libnetfilter-queue-dev nginx-light wrk"

say() { printf '%s\n' "$*" >&2; }

# apt-get, which waits for another run of it, and tries again what the network refuses for a moment.
apt_get() {
    DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 -o Acquire::Retries=5 -qq "$@"
}

# Read the lists of packages.
update_lists() {
    for seconds in 3 10 30; do
        if apt_get update >&2; then return 0; fi
        sleep "$seconds"
    done
    apt_get update >&2
}

# Install the packages that are missing; ask the package manager only when some are.
need_packages() {
    missing=""
    for package in "$@"; do
        dpkg-query -W -f='${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed || missing="$missing $package"
    done
    [ -n "$missing" ] || return 0
    if [ "$(id -u)" != 0 ]; then
        say "setup: these packages are missing, and only root can install them:$missing"
        exit 1
    fi
    say "setup: installing$missing"
    update_lists
    # shellcheck disable=SC2086 # one word each
    apt_get install -y --no-install-recommends $missing >/dev/null
}

# Unpack packages into build/unpacked, where they are not yet.
unpack_packages() {
    for package in "$@"; do
        folder=build/unpacked/$package
        [ ! -d "$folder" ] || continue
        say "setup: unpacking $package"
        rm -rf "$folder.new"
        mkdir -p "$folder.new"
        # The lists may be missing or out of date.
        (cd "$folder.new" && apt-get -qq download "$package" 2>/dev/null) || {
            update_lists
            (cd "$folder.new" && apt_get download "$package" >&2)
        }
        (cd "$folder.new" && dpkg-deb -x ./*.deb . && rm ./*.deb)
        mv "$folder.new" "$folder"
    done
}

setup_system() {
    # shellcheck disable=SC2086 # one word each
    need_packages $RUN_PACKAGES
}

venv_install() {
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --retries 10 --timeout 60 "$@"
}

# Make .venv/, or bring it up to date: requirements are installed when their files change, compiled modules are built when
# they or pyproject.toml change. One run at a time.
setup_venv() {
    required=$(cat packaging/requirements-build.txt packaging/requirements-dev.txt | sha256sum)
    built=$(cat pyproject.toml $(find agent -name '*.pyx' -o -name '*.pxd' -o -name '*.bpf.c' | sort) | sha256sum)
    if [ ! -w . ]; then
        [ "$(cat .venv/.required 2>/dev/null)$(cat .venv/.built 2>/dev/null)" != "$required$built" ] || return 0
        say "setup: .venv is missing or out of date, and this user cannot write into $PWD: run packaging/setup as its owner"
        exit 1
    fi
    exec 9>.venv.lock
    flock 9
    if [ "$(cat .venv/.required 2>/dev/null)" != "$required" ]; then
        say "setup: installing what .venv needs"
        [ -d .venv ] || /usr/bin/python3 -m venv .venv
        rm -f .venv/.built
        venv_install --require-hashes -r packaging/requirements-build.txt
        venv_install --require-hashes --no-build-isolation --use-pep517 -r packaging/requirements-dev.txt
        printf '%s' "$required" >.venv/.required
    fi
    if [ "$(cat .venv/.built 2>/dev/null)" != "$built" ]; then
        say "setup: building the compiled modules"
        packaging/bpf
        # Cython looks at times alone: C that it wrote by other directives of pyproject.toml would stay.
        find agent -name '*.pyx' | sed 's/pyx$/c/' | xargs rm -f agent/nfq_agent/memory_views.c
        venv_install --no-deps --no-build-isolation -e .
        printf '%s' "$built" >.venv/.built
    fi
    flock -u 9
    exec 9>&-
}
