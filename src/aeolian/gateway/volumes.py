"""Contents of Volumes over HTTP: the URLs that `control.volume_contents` signs."""

from aiohttp import web

from aeolian.control.volume_contents import VolumeContents
from aeolian.gateway.bodies import chunks_of
from aeolian.gateway.send_file import send_file


class VolumeRoutes:
    def __init__(self, contents: VolumeContents):
        self._contents = contents

    def routes(self) -> list[web.RouteDef]:
        return [
            web.put("/volumes/blocks/{content}/{index:\\d{1,9}}", self.put_block),
            web.get("/volumes/files/{content}", self.get_slice),
        ]

    async def put_block(self, request: web.Request) -> web.Response:
        """The body of the answer is a receipt that clients give back; ours is empty, we look for the block itself."""
        content, index = request.match_info["content"], int(request.match_info["index"])
        await self._contents.receive_block(request.path, request.query, content, index, chunks_of(request))
        return web.Response()

    async def get_slice(self, request: web.Request) -> web.StreamResponse:
        path, offset, length = self._contents.download(
            request.method, request.path, request.query, request.match_info["content"]
        )
        return await send_file(request, path, offset=offset, length=length)
