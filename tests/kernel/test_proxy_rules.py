"""The rules that lead connections to the proxy, and the listeners that take them."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import pytest
from namespace import Namespace
from proxied import TPROXY, configuration

from nfq_agent.config import file as configfile
from nfq_agent.config.models import ConfigError
from nfq_agent.config.proxy import ProxyConfig
from nfq_agent.proxy.listeners import listen
from nfq_agent.rules.leaving import keep_for_draining
from nfq_agent.rules.model import Rule
from nfq_agent.rules.plan import plan

pytestmark = pytest.mark.kernel


class TestRules:
    """What `plan` asks of the kernel for a proxy, in the text of `iptables -S`."""

    def text(self, tmp_path: Path, parked: bool = False, **options: str) -> dict[str, list[str]]:
        path = tmp_path / "agent.toml"
        path.write_text(configuration(**options))
        ruleset = plan(configfile.load(path), 972)
        ruleset = keep_for_draining(ruleset) if parked else ruleset

        def short(rule: Rule) -> str:
            text = re.sub(r' -m comment --comment "nfq-agent:default:(\S+)"', r" #\1", str(rule))
            return text.replace("NFQA-default-", "@").replace("-m multiport ", "")

        return {
            f"{family} {table}": [short(rule) for rule in content.rules]
            for family, tables in ruleset.items()
            for table, content in tables.items()
        }

    def test_redirect(self, tmp_path: Path) -> None:
        listen = '"0.0.0.0:15002", "0.0.0.0:8085", "[::]:15003"'
        found = self.text(tmp_path, listen=listen, proxy='exclude = ["10.0.0.0/8", "fd00::/8", "192.0.2.1/32"]')
        assert found["inet nat"] == [
            "-A OUTPUT #jump -j @OUTPUT",
            "-A @OUTPUT -m owner --uid-owner 972 #own-traffic -j RETURN",
            "-A @OUTPUT -p tcp --dports 8085 -m addrtype --dst-type LOCAL #redirect -j RETURN",
            "-A @OUTPUT -p tcp --dports 8080:8090 -m iprange --dst-range 10.0.0.0-10.255.255.255 #redirect -j RETURN",
            "-A @OUTPUT -p tcp --dports 8080:8090 -m iprange --dst-range 192.0.2.1-192.0.2.1 #redirect -j RETURN",
            "-A @OUTPUT -p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN --dports 8080:8090 -m mark ! --mark 0x1000/0x1000 "
            "#redirect -j REDIRECT --to-ports 15002",
            "-A @OUTPUT #end -j RETURN",
        ]
        assert found["inet6 nat"][-2].endswith("-j REDIRECT --to-ports 15003")

    def test_a_rule_that_names_its_listener(self, tmp_path: Path) -> None:
        found = self.text(tmp_path, listen='"0.0.0.0:15002", "0.0.0.0:15006", "[::]:15002"', rule="port = 15006")
        assert found["inet nat"][-1].endswith("-j REDIRECT --to-ports 15006")
        assert "inet6 nat" not in found or not any("REDIRECT" in rule for rule in found["inet6 nat"])
        for family in ("inet", "inet6"):
            assert self.text(tmp_path, listen='"[::]:15002", "[::]:15006"', rule="port = 15006")[f"{family} nat"][-1].endswith(
                "-j REDIRECT --to-ports 15006"
            )

    def test_tproxy(self, tmp_path: Path) -> None:
        found = self.text(tmp_path, hooks='"prerouting"', proxy=TPROXY)
        assert list(found) == ["inet mangle", "inet6 mangle"]
        assert found["inet6 mangle"] == [
            "-A PREROUTING #jump -j @PREROUTING",
            "-A @PREROUTING -p tcp -m socket --transparent #redirect -j MARK --set-xmark 0x800/0x800",
            "-A @PREROUTING -p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN --dports 8080:8090 -m mark ! --mark 0x1000/0x1000 "
            "#redirect -j TPROXY --on-port 15002 --on-ip :: --tproxy-mark 0x800/0x800",
            "-A @PREROUTING #end -j RETURN",
        ]

    def test_parked(self, tmp_path: Path) -> None:
        assert self.text(tmp_path, parked=True)["inet nat"] == [
            "-A @OUTPUT -p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN --dports 8080:8090 -m mark ! --mark 0x1000/0x1000 "
            "-m owner ! --uid-owner 972 #redirect -j REDIRECT --to-ports 15002"
        ]
        assert self.text(tmp_path, parked=True, hooks='"prerouting"', proxy=TPROXY)["inet mangle"] == [
            "-A PREROUTING #jump -j @PREROUTING",
            "-A @PREROUTING -p tcp -m socket --transparent #redirect -j MARK --set-xmark 0x800/0x800",
        ]

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (
                {"proxy": 'capture = "tproxy"'},
                'rules.redirect.hooks: TPROXY takes only incoming packets (line 7); allowed: hooks = ["prerouting"]',
            ),
            ({"proxy": "keep_client = true"}, 'allowed: with capture = "tproxy"'),
            ({"proxy": 'exclude = ["10.0.0.1/8"]'}, "did you mean '10.0.0.0/8'?"),
            ({"proxy": 'elements = ["log"]'}, "unknown element 'log' (line 4); allowed: delay, http-host"),
            ({"rule": "port = 15007"}, "proxy tcp does not listen on port 15007 (line 9); allowed: 15002"),
            ({"proxy": 'elements = ["sni"]'}, "nothing would be denied"),
        ],
    )
    def test_refused(self, tmp_path: Path, options: dict[str, Any], said: str) -> None:
        with pytest.raises(ConfigError, match=re.escape(said)):
            self.text(tmp_path, **options)


class TestListen:
    def test_the_error_names_the_address(self, netns: Namespace) -> None:
        def twice() -> str:
            config = ProxyConfig.model_validate({"listen": ["127.0.0.1:15002", "127.0.0.1:15003"]})
            with socket.create_server(("127.0.0.1", 15003)):
                try:
                    listen(config)
                except OSError as error:
                    return str(error)
            return "no error"

        assert "127.0.0.1:15003: Address already in use" in netns.call(twice)
