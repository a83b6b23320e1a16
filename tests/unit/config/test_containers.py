"""`[containers]`: the defaults are the hardened ones, and contradictions are refused."""

import pytest
from pydantic import ValidationError

from turnwise.config.containers import ContainersConfig, HostConfig, LimitsConfig


def test_nothing_is_relaxed_unless_the_config_says_so():
    config = ContainersConfig()
    assert (config.network, config.user, config.read_only, config.capabilities) == ("none", "1000:1000", True, [])


def test_files_that_could_fill_the_memory_are_refused_with_the_number_that_fits():
    with pytest.raises(ValidationError, match="raise memory_mib to 1208"):
        LimitsConfig(home_mib=1000)
    assert LimitsConfig(home_mib=1000, memory_mib=1208).memory_mib == 1208


def test_plain_tcp_is_refused_unless_it_is_asked_for():
    with pytest.raises(ValidationError, match="becomes root"):
        HostConfig(url="tcp://far:2375")
    assert HostConfig(url="tcp://far:2375", insecure=True).insecure


@pytest.mark.parametrize("url", ["unix:///run/docker.sock", "ssh://me@far"])
def test_tls_files_that_nothing_reads_are_refused(url: str):
    with pytest.raises(ValidationError, match="does not use them"):
        HostConfig.model_validate({"url": url, "tls_ca": "ca.pem"})


@pytest.mark.parametrize("url", ["", "docker.sock", "http://far", "unix://"])
def test_other_urls_are_refused(url: str):
    with pytest.raises(ValidationError, match="url"):
        HostConfig(url=url)
