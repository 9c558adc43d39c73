//! stub until merged
use futures::future::BoxFuture;
pub struct Flights<K,V,E>(std::marker::PhantomData<fn(K,V,E)>);
impl<K,V,E> Default for Flights<K,V,E> { fn default() -> Self { Self(std::marker::PhantomData) } }
impl<K,V,E> Flights<K,V,E> { pub async fn join(&self, _k: K, make: impl FnOnce() -> BoxFuture<'static, Result<V,E>>) -> Result<V,E> { make().await } }
