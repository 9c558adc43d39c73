//! The web page.
use super::api::Api;
use axum::Router;
pub fn routes() -> Router<Api> {
    Router::new()
}
