"""Apache, Node, HAProxy and Go beside the servers of the table: each writes down the host that it has understood."""

from __future__ import annotations

import atexit
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from namespace import Namespace

_APACHE = """
ServerRoot /usr/lib/apache2
LoadModule mpm_event_module modules/mod_mpm_event.so
LoadModule authz_core_module modules/mod_authz_core.so
LoadModule rewrite_module modules/mod_rewrite.so
ServerName here
Listen 8101
PidFile /run/apache.pid
ErrorLog FOLDER/apache-error.log
DocumentRoot FOLDER
UseCanonicalName Off
LogFormat "apache %V %{Host}i %U" seen
CustomLog FOLDER/other-apache.log seen
RewriteEngine On
RewriteRule .* - [R=204]
"""
_HAPROXY = """
global
  log stdout format raw local0
defaults
  mode http
  timeout client 5s
  timeout server 5s
  timeout connect 5s
frontend all
  bind :::8103 v4v6
  log global
  http-request capture req.hdr(host) len 100
  log-format "haproxy %[capture.req.hdr(0)] %HU"
  http-request return status 200
"""
_NODE = """
const http = require("http"), fs = require("fs");
http.createServer((request, answer) => {
  fs.appendFileSync(process.argv[2], `node ${request.headers.host} ${request.url}\\n`);
  answer.end("ok");
}).listen(8102, "::");
"""
_GO = """
package main
import ("fmt"; "net/http"; "os")
func main() {
  log, _ := os.OpenFile(os.Args[1], os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0644)
  http.ListenAndServe(":8104", http.HandlerFunc(func(answer http.ResponseWriter, request *http.Request) {
    fmt.Fprintf(log, "go %s %s\\n", request.Host, request.URL)
  }))
}
"""


@dataclass(frozen=True)
class Other:
    """A server. program, package: what it needs. start: runs it, given the namespace, a folder and its log."""

    name: str
    port: int
    program: str
    package: str
    start: Callable[[Namespace, Path, Path], None]

    @property
    def missing(self) -> bool:
        """Whether its program is not installed."""
        return shutil.which(self.program) is None


def _run(netns: Namespace, log: Path, *argv: str) -> None:
    with open(log.with_suffix(".out"), "wb") as output:
        netns.start(*argv, stdout=output, stderr=output)


def _apache(netns: Namespace, folder: Path, log: Path) -> None:
    conf = folder / "apache.conf"
    conf.write_text(_APACHE.replace("FOLDER", str(folder)))
    _run(netns, log, "apache2", "-X", "-f", str(conf))


def _haproxy(netns: Namespace, folder: Path, log: Path) -> None:
    conf = folder / "haproxy.cfg"
    conf.write_text(_HAPROXY)
    with open(log, "wb") as output:
        netns.start("haproxy", "-db", "-f", str(conf), stdout=output, stderr=subprocess.DEVNULL)


def _node(netns: Namespace, folder: Path, log: Path) -> None:
    script = folder / "server.js"
    script.write_text(_NODE)
    _run(netns, log, "node", str(script), str(log))


@cache
def _built() -> Path:
    """The server in Go, compiled once."""
    folder = Path(tempfile.mkdtemp(prefix="go-server-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "server.go").write_text(_GO)
    environment = {"HOME": str(folder), "PATH": "/usr/bin:/bin", "GO111MODULE": "off"}
    subprocess.run(["go", "build", "-o", "server", "server.go"], check=True, env=environment, cwd=folder)
    return folder / "server"


def _go(netns: Namespace, folder: Path, log: Path) -> None:
    _run(netns, log, str(_built()), str(log))


OTHERS = (
    Other("apache", 8101, "apache2", "apache2-bin", _apache),
    Other("node", 8102, "node", "nodejs", _node),
    Other("haproxy", 8103, "haproxy", "haproxy", _haproxy),
    Other("go", 8104, "go", "golang-go", _go),
)
