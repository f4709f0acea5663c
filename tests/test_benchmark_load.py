"""The load generator: an answer is lost only if the server failed to give it."""

import asyncio

from benchmarks.load import LoadSpec, _Load

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def test_a_connection_that_the_server_closed_while_it_was_idle_is_not_used_again():
    served = []

    async def serve_one(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(ANSWER)
        served.append(None)
        writer.close()

    async def run():
        server = await asyncio.start_server(serve_one, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        job = LoadSpec(url=f"http://127.0.0.1:{port}/x", paths=["/x"], rate=10, seconds=1)
        async with server:
            return await _Load(job).run()

    result = asyncio.run(run())
    assert result.statuses == {"200": len(served)}
    assert len(served) > 3
