"""Requests as bytes, for the tests of the parser and for those of the service: which are errors, and which are not."""

from tests.support.service import body

HOST = b"Host: a\r\n"
PUT = b"PUT /hello/Sesame HTTP/1.1\r\nHost: a\r\n"
GET = b"GET /hello/Sesame HTTP/1.1\r\nHost: a\r\n"
CHUNKED = PUT + b"Transfer-Encoding: chunked\r\n\r\n"
DATE = body("1990-05-17")
CHUNKS = b"1d\r\n" + DATE + b"\r\n0\r\n\r\n"
SECOND = b"GET /hello/Second HTTP/1.1\r\nHost: a\r\n\r\n"  # behind a request, to show where the parser thinks it ends

# What is not a request, and the status of the response to it
ERRORS = {
    # Where the content ends (RFC 9112, section 6)
    "both lengths": (PUT + b"Content-Length: 29\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "both lengths, the other order": (PUT + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n", 400),
    "two lengths": (PUT + b"Content-Length: 29\r\nContent-Length: 0\r\n\r\n", 400),
    "two equal lengths": (PUT + b"Content-Length: 29\r\nContent-Length: 29\r\n\r\n" + DATE, 400),
    "length with a sign": (PUT + b"Content-Length: +29\r\n\r\n" + DATE, 400),
    "length in hexadecimal": (PUT + b"Content-Length: 0x1d\r\n\r\n" + DATE, 400),
    "length of many zeros": (PUT + b"Content-Length: " + b"0" * 5000 + b"\r\n\r\n", 400),
    "list of lengths": (PUT + b"Content-Length: 29, 29\r\n\r\n" + DATE, 400),
    "empty length": (PUT + b"Content-Length: \r\n\r\n", 400),
    "length of another script": (PUT + "Content-Length: ²\r\n\r\n12".encode("latin-1"), 400),
    "coding without chunked": (PUT + b"Transfer-Encoding: gzip\r\n\r\n", 400),
    "coding that looks like chunked": (PUT + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 400),
    "coding and vertical tab": (PUT + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n", 400),
    "chunked twice": (PUT + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n", 400),
    "chunked not last": (PUT + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n", 400),
    "gzip before chunked": (PUT + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + CHUNKS, 501),
    "gzip and chunked in two headers": (PUT + b"Transfer-Encoding: gzip\r\n" + CHUNKED.removeprefix(PUT) + CHUNKS, 501),
    "chunked in HTTP/1.0": (CHUNKED.replace(b"1.1", b"1.0") + CHUNKS, 400),
    "space before colon": (PUT + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n", 400),
    "folded coding": (PUT + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n", 400),
    "chunk size not a number": (CHUNKED + b"sesame\r\n" + DATE + b"\r\n0\r\n\r\n", 400),
    "chunk size with prefix": (CHUNKED + b"0x1d\r\n" + DATE + b"\r\n0\r\n\r\n", 400),
    "empty chunk size": (CHUNKED + b"\r\n" + DATE + b"\r\n0\r\n\r\n", 400),
    "endless chunk size": (CHUNKED + b"0" * 10000, 400),
    "chunk too long": (CHUNKED + b"1c\r\n" + DATE + b"\r\n0\r\n\r\n", 400),
    "chunk size ends with LF": (CHUNKED + b"1d\n" + DATE + b"\n0\n\n", 400),
    "chunk extension with CR": (CHUNKED + b"1d;a\rb\r\n" + DATE + b"\r\n0\r\n\r\n", 400),
    "length as trailer": (CHUNKED + b"1d\r\n" + DATE + b"\r\n0\r\nContent-Length: 5\r\n\r\n", 400),
    # Host (RFC 9110, section 7.2; RFC 9112, section 3.2)
    "two hosts": (GET + b"Host: b\r\n\r\n", 400),
    "no host": (b"GET /hello/Sesame HTTP/1.1\r\n\r\n", 400),
    "two hosts in HTTP/1.0": (b"GET /hello/Sesame HTTP/1.0\r\nHost: a\r\nHost: a\r\n\r\n", 400),
    **{
        f"host {host}": (b"GET /hello/Sesame HTTP/1.1\r\nHost: %b\r\n\r\n" % host.encode(), 400)
        for host in ("a b", "a/b", "u@a", "a:x", "[::1", "a:80:80", "a?b", "a#b", "a%2", "a\\b", '"a"', "<a>", "::1")
    },
    # The request line (RFC 9112, section 3)
    "no version": (b"GET /hello/Sesame\r\n\r\n", 400),
    "version 2": (b"GET /hello/Sesame HTTP/2.0\r\n" + HOST + b"\r\n", 505),
    "version 1.10": (b"GET /hello/Sesame HTTP/1.10\r\n" + HOST + b"\r\n", 400),
    "preface of HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "RTSP": (b"GET /hello/Sesame RTSP/1.0\r\n" + HOST + b"\r\n", 400),
    "RTSP with a method of its own": (b"DESCRIBE /hello/Sesame RTSP/1.0\r\n" + HOST + b"\r\n", 501),
    "unknown method": (b"SESAME /hello/Sesame HTTP/1.1\r\n" + HOST + b"\r\n", 501),
    "method of WebDAV": (b"MKCOL /hello/Sesame HTTP/1.1\r\n" + HOST + b"\r\n", 501),
    "method in small letters": (b"get /hello/Sesame HTTP/1.1\r\n" + HOST + b"\r\n", 501),
    "tunnel": (b"CONNECT sesame:80 HTTP/1.1\r\n" + HOST + b"\r\n", 501),
    "no method": (b" /hello/Sesame HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "method with brackets": (b"G(E)T /hello/Sesame HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "tabs": (b"GET\t/hello/Sesame\tHTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "space in the target": (b"GET /hello/Ses ame HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "bytes in the target": (b"GET /hello/S\xc3\xa9same HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "nul in the target": (b"GET /hello/Ses\x00ame HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "asterisk of OPTIONS": (b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "target without a slash": (b"GET sesame HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    **{
        f"target {target}": (b"GET %b HTTP/1.1\r\n" % target.encode() + HOST + b"\r\n", 400)
        for target in ("http:///livez", "http://a:b/", "http://u@a/livez", "http://[sesame/", "ftp://a/livez")
    },
    "long target": (b"GET /hello/" + b"Sesame" * 2000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 414),
    "endless target": (b"GET /hello/" + b"Sesame" * 20000, 414),
    "blank lines without end": (b"\r\n" * 50_000, 431),
    # Headers (RFC 9112, section 5)
    "folded header": (GET + b"X-A: b\r\n c\r\n\r\n", 400),
    "nul in a header": (GET + b"X-A: b\x00c\r\n\r\n", 400),
    "CR in a header": (GET + b"X-A: b\rX-C: d\r\n\r\n", 400),
    "header without colon": (GET + b"sesame\r\n\r\n", 400),
    "header without name": (GET + b": sesame\r\n\r\n", 400),
    "space in a header's name": (GET + b"X A: b\r\n\r\n", 400),
    "control in a header's name": (GET + b"X\x01A: b\r\n\r\n", 400),
    "line ends of LF": (GET.replace(b"\r", b"") + b"\n", 400),
    "one line end of LF": (GET + b"X-A: b\nTransfer-Encoding: chunked\r\n\r\n", 400),
    "request line ends with LF": (b"GET /hello/Sesame HTTP/1.1\n" + HOST + b"\r\n", 400),
    "line ends of CR": (GET.replace(b"\n", b"") + b"\r", 400),
    "long header": (GET + b"X-A: " + b"sesame" * 3000 + b"\r\n\r\n", 431),
    "many headers": (GET + b"X-A: sesame\r\n" * 100 + b"\r\n", 431),
    "endless head": (GET + b"X-A: sesame\r\n" * 100_000, 431),
    # Expect (RFC 9110, section 10.1.1)
    "unknown expectation": (PUT + b"Expect: sesame\r\nContent-Length: 29\r\n\r\n" + DATE, 417),
    "two expectations": (PUT + b"Expect: 100-continue, sesame\r\nContent-Length: 29\r\n\r\n" + DATE, 417),
    "expectation and no-break space": (PUT + b"Expect: \xa0100-continue\r\nContent-Length: 29\r\n\r\n" + DATE, 417),
    # Other protocols
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) * 2, 400),
}

# What is refused for one fault although llhttp stumbles over another, and the status of the response to it
SPACE, TAB = b"Transfer-Encoding: chunked \r\n", b"Transfer-Encoding: chunked\t\r\n"
UPGRADE = b"Connection: Upgrade\r\nUpgrade: h2c\r\n"
TWO_FAULTS = {
    "upgrade and too much content": (PUT + UPGRADE + b"Expect: 100-continue\r\nContent-Length: 6000\r\n\r\n", 413),
    "upgrade and an unknown expectation": (PUT + UPGRADE + b"Expect: sesame\r\n\r\n", 417),
    "upgrade and two hosts": (PUT + UPGRADE + b"Host: b\r\n\r\n", 400),
    "upgrade and a bad chunk": (PUT + UPGRADE + b"Transfer-Encoding: chunked\t\r\n\r\nzz", 400),
    "upgrade and a CR": (PUT + UPGRADE + b"X-A: b\rTransfer-Encoding: chunked\r\n\r\n", 400),
    "space behind chunked and an unknown expectation": (PUT + SPACE + b"Expect: sesame\r\n\r\n", 417),
    "tabs behind chunked, twice": (PUT + TAB + TAB + b"\r\n", 400),
    "a line of a tab": (PUT + b"\t\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
}

# What HTTP allows, and the status of the response to it
PUT_SECOND = b"PUT /hello/Second HTTP/1.1\r\nHost: a\r\nTransfer-Encoding:"
GOOD = {
    "blank lines before it (RFC 9112, 2.2)": (b"\r\n" * 3 + SECOND, 200),
    "two spaces (RFC 9112, 3)": (SECOND.replace(b" ", b"  ", 1), 200),
    "white space around values (RFC 9112, 5)": (
        b"PUT /hello/Second HTTP/1.1\r\nhost:\ta \r\nCONTENT-LENGTH:29 \t\r\n\r\n" + DATE,
        204,
    ),
    "white space around chunked (RFC 9112, 5.1)": (PUT_SECOND + b"\tchunked\t\r\n\r\n" + CHUNKS, 204),
    "chunked and an empty element (RFC 9110, 5.6.1)": (PUT_SECOND + b"chunked, ,\r\n\r\n" + CHUNKS, 204),
    "chunked in capitals": (PUT_SECOND + b"Chunked\r\n\r\n" + CHUNKS, 204),
    "absolute target (RFC 9112, 3.2.2)": (b"GET http://b:80/livez HTTP/1.1\r\nHost: a\r\n\r\n", 200),
    "absolute target without a port": (b"GET HTTP://[::1]/livez HTTP/1.1\r\nHost: a\r\n\r\n", 200),
    "no host in HTTP/1.0": (b"GET /livez HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", 200),
    **{
        f"host '{host}'": (b"GET /livez HTTP/1.1\r\nHost: %b\r\n\r\n" % host.encode(), 200)
        for host in ("", "a", "a.example:8080", "a_b", "a:", "[::1]", "[::1]:80", "127.0.0.1", "%61", "xn--a")
    },
    "upgrade (RFC 9110, 7.8)": (b"GET /livez HTTP/1.1\r\nHost: a\r\n" + UPGRADE + b"\r\n", 200),
    "expectation in HTTP/1.0": (
        b"PUT /hello/Second HTTP/1.0\r\nExpect: x\r\nConnection: keep-alive\r\nContent-Length: 29\r\n\r\n" + DATE,
        204,
    ),
    "long token": (b"GET /livez HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer " + b"a" * 4200 + b"\r\n\r\n", 200),
    "unknown header bytes": (b"GET /livez HTTP/1.1\r\nHost: a\r\nX-A: \xe9\r\n\r\n", 200),
}


def pieces(data: bytes, size: int = 8192) -> list[bytes]:
    """Cut bytes into pieces, by default as a worker receives them."""
    return [data[start : start + size] for start in range(0, len(data), size)]
