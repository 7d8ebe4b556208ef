//! What the API is, in the terms of OpenAPI 3.1: generated from the routes and the types of their answers.
//!
//! A route that is registered with `routes!` is described by the attribute at its function; the documents'
//! schemas come from their types, and the descriptions from the comments there. Each socket describes what it
//! answers.

use std::sync::Arc;

use axum::{Extension, Router, http::StatusCode, response::Response};
use utoipa::{OpenApi, openapi};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{ErrorDocument, Monitor, json};

/// What holds for all routes.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "vmflow",
        description = "What every VM of this host sent and received, by the label of its virtqueue. HTTP/1.1 on \
            two unix sockets: the stats socket answers GET only, the control socket makes changes too. A \
            connection serves one request. Directions are the guest's. Counters only grow, also over restarts \
            and reboots."
    ),
    components(schemas(ErrorDocument))
)]
struct Described;

/// A router without routes.
pub(super) fn router() -> OpenApiRouter<Monitor> {
    OpenApiRouter::with_openapi(Described::openapi())
}

/// The routes, and one that describes them.
pub(super) fn described(router: OpenApiRouter<Monitor>) -> Router<Monitor> {
    let (router, description) = router.routes(routes!(describe)).split_for_parts();
    router.layer(Extension(Arc::new(description)))
}

/// What there is: this document.
#[utoipa::path(get, path = "/v1/openapi.json", responses(
    (status = 200, description = "This document: OpenAPI 3.1", body = Object),
))]
async fn describe(Extension(description): Extension<Arc<openapi::OpenApi>>) -> Response {
    json(StatusCode::OK, &*description)
}
