"""Formats of strings, as regular expressions: what matches is of the format, whoever looks.

Narrower than the standards here and there: dates have capital letters and no leap seconds.
"""

from __future__ import annotations

_YEAR = r"(?:000[1-9]|00[1-9]\d|0[1-9]\d\d|[1-9]\d{3})"
_MULTIPLE_OF_4 = r"(?:0[48]|[2468][048]|[13579][26])"
_LEAP_YEAR = rf"(?:\d\d{_MULTIPLE_OF_4}|{_MULTIPLE_OF_4}00)"
_MONTH_AND_DAY = (
    r"(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])"
    r"|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)"
    r"|02-(?:0[1-9]|1\d|2[0-8]))"
)
_DATE = rf"(?:{_YEAR}-{_MONTH_AND_DAY}|{_LEAP_YEAR}-02-29)"
_TIME = r"(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,9})?(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)"
_BYTE = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_IPV4 = rf"{_BYTE}(?:\.{_BYTE}){{3}}"
_H16 = r"[0-9a-fA-F]{1,4}"
_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,59}[a-zA-Z0-9])?"
_HOSTNAME = rf"{_LABEL}(?:\.{_LABEL}){{0,3}}"  # 255 characters at most
_ATOM = r"[a-zA-Z0-9!#$%&'*+/=?^_`{|}~-]{1,64}"
_UNRESERVED = r"(?:[a-zA-Z0-9._~!$&'()*+,;=:@-]|%[0-9a-fA-F]{2})"
_FURTHER = rf"(?:/{_UNRESERVED}*)*"
_TAIL = rf"(?:\?(?:{_UNRESERVED}|[/?])*)?(?:#(?:{_UNRESERVED}|[/?])*)?"
_AUTHORITY = rf"(?:[a-zA-Z0-9._~!$&'()*+,;=-]+@)?(?:{_HOSTNAME}|{_IPV4})(?::\d{{1,4}})?"
_DURATION_TIME = r"T(?:\d{1,9}H(?:\d{1,9}M)?(?:\d{1,9}S)?|\d{1,9}M(?:\d{1,9}S)?|\d{1,9}S)"
_POINTER = r"(?:/(?:[^~/]|~[01])*)*"


def _ipv6() -> str:
    forms = [rf"(?:{_H16}:){{7}}{_H16}", "::"]
    for before in range(8):  # groups before the two colons; one of eight is missing at least
        head = rf"{_H16}(?::{_H16}){{{before - 1}}}" if before else ""
        after = 7 - before
        tail = rf"{_H16}(?::{_H16}){{0,{after - 1}}}" if after else ""
        if before and after:
            forms.append(rf"{head}::(?:{tail})?")
        elif before or after:
            forms.append(f"{head}::{tail}")
    return "|".join(forms)


FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "duration": (
        rf"P(?:\d{{1,9}}W|\d{{1,9}}Y(?:\d{{1,9}}M(?:\d{{1,9}}D)?)?(?:{_DURATION_TIME})?"
        rf"|\d{{1,9}}M(?:\d{{1,9}}D)?(?:{_DURATION_TIME})?|\d{{1,9}}D(?:{_DURATION_TIME})?"
        rf"|{_DURATION_TIME})"
    ),
    "email": rf"{_ATOM}(?:\.{_ATOM})*@{_HOSTNAME}",
    "hostname": _HOSTNAME,
    "ipv4": _IPV4,
    "ipv6": _ipv6(),
    "uuid": r"[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}",
    "uri": rf"[a-zA-Z][a-zA-Z0-9+.-]*:(?://{_AUTHORITY}{_FURTHER}|/?{_UNRESERVED}+{_FURTHER}){_TAIL}",
    "json-pointer": _POINTER,
    "byte": r"(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?",  # base64
}

# OpenAPI's for strings that may be anything.
FREE = frozenset({"password", "binary"})
# OpenAPI's for numbers: they bound none that a model writes but these.
OF_INTEGERS = {"int32": (-(2**31), 2**31 - 1)}
