"""The numbers that are reported when a model is quantised."""

import math

import pytest
import torch

from turnwise.kernels.mxfp4 import ErrorReport, ScaleMode, error_report, errors, quantize


@pytest.mark.parametrize(("mode", "frobenius"), [("floor", 0.114), ("even", 0.112), ("rceil", 0.119), ("ceil", 0.137)])
def test_gaussian_weights_have_the_known_error(mode: ScaleMode, frobenius: float):
    weight = 0.02 * torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))  # the error depends on log2(sigma) mod 1
    report = error_report(weight, *quantize(weight, scale_mode=mode))
    assert report.frobenius == pytest.approx(frobenius, abs=6e-4)
    if mode in ("floor", "even"):
        assert report.sqnr_db == pytest.approx(19.0, abs=0.2)
        assert 0.195 < report.mean_relative < 0.22


def test_the_three_numbers_are_what_they_are_called():
    weight = torch.zeros(1, 32)
    weight[0, :3] = torch.tensor([6.0, 2.4, -1.1])  # decoded: 6, 2, -1
    report = error_report(weight, *quantize(weight, scale_mode="floor"))
    signal, noise = 36 + 2.4**2 + 1.1**2, 0.4**2 + 0.1**2
    assert report.weights == 32
    assert report.frobenius == pytest.approx(math.sqrt(noise / signal))
    assert report.sqnr_db == pytest.approx(10 * math.log10(signal / noise))
    assert report.mean_relative == pytest.approx((0.4 / 2.4 + 0.1 / 1.1) / 3)
    assert str(report) == "Frobenius 6.3%, SQNR 24.0 dB, mean relative error 8.6%"


def test_reports_of_layers_add_up_to_that_of_the_model():
    first, second = torch.randn(8, 64), 3 * torch.randn(24, 64)
    together = torch.cat((first, second))
    total = error_report(first, *quantize(first)) + error_report(second, *quantize(second))
    whole = error_report(together, *quantize(together))
    assert total.weights == whole.weights
    assert total.frobenius == pytest.approx(whole.frobenius)
    assert total.mean_relative == pytest.approx(whole.mean_relative)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch):
    weight = torch.randn(33, 64)
    whole = error_report(weight, *quantize(weight))
    monkeypatch.setattr(errors, "CHUNK_WEIGHTS", 128)
    assert error_report(weight, *quantize(weight)).noise == pytest.approx(whole.noise)


def test_a_weight_of_zeros_has_no_error():
    report = error_report(torch.zeros(2, 32), *quantize(torch.zeros(2, 32)))
    assert (report.frobenius, report.mean_relative, report.sqnr_db) == (0.0, 0.0, math.inf)
    assert ErrorReport(0, 0, 0.0, 0.0, 0.0).frobenius == 0.0


def test_codes_of_another_weight_are_refused():
    with pytest.raises(ValueError, match="no codes of shape"):
        error_report(torch.zeros(2, 64), *quantize(torch.zeros(2, 32)))
