"""Blobs over HTTP: the URLs that `control.blobs` signs."""

from aiohttp import web

from aeolian.control.blobs import Blobs
from aeolian.gateway.bodies import chunks_of, text_of
from aeolian.gateway.send_file import send_file

MAX_COMPLETION_BYTES = 4 << 20


class BlobRoutes:
    def __init__(self, blobs: Blobs):
        self._blobs = blobs

    def routes(self) -> list[web.RouteDef]:
        return [
            web.put("/blobs/{blob_id}", self.put),
            web.put("/blobs/{blob_id}/parts/{index:\\d{1,6}}", self.put_part),
            web.post("/blobs/{blob_id}/complete", self.complete),
            web.get("/blobs/{blob_id}", self.get),
        ]

    async def put(self, request: web.Request) -> web.Response:
        blob_id = request.match_info["blob_id"]
        md5 = await self._blobs.upload(request.path, request.query, blob_id, chunks_of(request))
        return web.Response(headers={"ETag": f'"{md5}"'})

    async def put_part(self, request: web.Request) -> web.Response:
        blob_id, index = request.match_info["blob_id"], int(request.match_info["index"])
        chunks = chunks_of(request)
        md5 = await self._blobs.upload_part(request.path, request.query, blob_id, index, chunks)
        return web.Response(headers={"ETag": f'"{md5}"'})

    async def complete(self, request: web.Request) -> web.Response:
        body = await text_of(request, max_bytes=MAX_COMPLETION_BYTES)
        etag = await self._blobs.complete(request.path, request.query, request.match_info["blob_id"], body)
        text = f'<CompleteMultipartUploadResult><ETag>"{etag}"</ETag></CompleteMultipartUploadResult>'
        return web.Response(text=text, content_type="application/xml")

    async def get(self, request: web.Request) -> web.StreamResponse:
        path = await self._blobs.download(request.method, request.path, request.query, request.match_info["blob_id"])
        return await send_file(request, path)
